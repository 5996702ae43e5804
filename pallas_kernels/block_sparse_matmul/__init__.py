"""Dense times block-sparse: `api` (public), `reference`, `xla`, `tpu`."""
