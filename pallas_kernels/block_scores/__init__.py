"""Norms of the blocks of a weight's gradient, without the gradient: `api` (public), `reference`, `xla`,
`tpu`; and sketches of the blocks, `sketch` (public)."""
