"""Following what is published while serving, and whether the service is fit to be asked."""
