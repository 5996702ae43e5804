"""The example trains, compacts, and serves the same network from fewer bytes."""

from experiments.studies import compact_and_serve


def test_the_example_serves_what_it_trained():
    result = compact_and_serve.main(["--width=256", "--steps=150", "--sparsity=0.8"])
    assert result["accuracy"] > 0.85
    assert result["largest_difference"] < 1e-3
    assert result["bytes_sparse"] < 0.4 * result["bytes_dense"]
