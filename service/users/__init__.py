"""Where a user's state comes from: resident, read from the store, or his request's own rows."""
