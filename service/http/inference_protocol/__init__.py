"""The Open Inference Protocol v2 over HTTP (`/v2/…`), with its binary tensor data extension.

schemas    the JSON objects of the protocol
wire       a body to tensors, tensors to a body: knows bytes, and nothing of ranking
tensors    which tensors a request of this service has, and what they mean
model      what is said of the model
routes     the handlers
"""
