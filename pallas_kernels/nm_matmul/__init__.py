"""Dense times N:M sparse: `api` (public), `reference`, `xla`, `tpu`."""
