"""Dense times unstructured or constant fan-in: `api` (public), `reference`, `xla`."""
