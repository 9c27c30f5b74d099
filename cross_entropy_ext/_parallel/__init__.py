"""Losses whose tensors are spread over the processes of `torch.distributed`."""
