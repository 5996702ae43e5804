"""The C++ kernels for CPU: built where there is a compiler, and done without where there is none."""

import os
import pathlib
import platform
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bases import BlockSparseMatmulBase, CondensedMatmulBase
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import BlockSparse, Condensed, block_sparse_matmul, condensed_matmul, cpu

built = pytest.mark.skipif(
    jax.default_backend() != "cpu" or cpu.why_not(jnp.float32) is not None,
    reason=f"no C++ kernels here: {cpu.why_not(jnp.float32)}",
)


@built
class TestCondensedMatmulCPU(CondensedMatmulBase):
    implementation = "cpu"


@built
class TestBlockSparseMatmulCPU(BlockSparseMatmulBase):
    implementation = "cpu"

    def test_bfloat16(self):
        w = self.weight((256, 256), (128, 128), np.eye(2) > 0, jnp.bfloat16)
        with pytest.raises(ValueError, match="it takes float32, not bfloat16"):
            block_sparse_matmul(jnp.ones((2, 256), jnp.bfloat16), w, **self.options)


@built
@given(
    blocks=st.sampled_from([(16, 16), (32, 80), (112, 64)]),
    rows=st.sampled_from([1, 25, 63]),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2),
)
def test_blocks_of_any_side_agree_with_dense(blocks, rows, density, seed):
    rng = np.random.default_rng(seed)
    grid = -(-230 // blocks[0]), -(-150 // blocks[1])
    mask = rng.random(grid) < density
    dense = rng.normal(size=(230, 150)).astype("f")
    w = BlockSparse.from_block_mask(dense, mask, blocks, num_blocks=grid[0] * grid[1], pad=True)
    dense = np.asarray(w.to_dense())
    x, dy = (rng.normal(size=(rows, n)).astype("f") for n in (230, 150))
    f = lambda x, v: block_sparse_matmul(x, w.with_values(v), implementation="cpu")
    y, pull = jax.vjp(f, x, w.values)
    dx, dvalues = pull(jnp.asarray(dy))
    tol = dict(rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(y, x @ dense, **tol)
    np.testing.assert_allclose(dx, dy @ dense.T, **tol)
    want = BlockSparse.from_block_mask(x.T @ dy, mask, blocks, num_blocks=w.num_blocks, pad=True)
    np.testing.assert_allclose(dvalues, want.values, **tol)


def small(seed=0):
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=(96, 70)) * (rng.random((96, 70)) < 0.2)
    x = jnp.asarray(rng.normal(size=(8, 96)), jnp.float32)
    return x, Condensed.from_dense(jnp.asarray(dense, jnp.float32)), dense


@built
def test_vmap_scan_and_shard_map():
    x, w, dense = small()
    f = lambda x: condensed_matmul(x, w, implementation="cpu")
    tol = dict(rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.vmap(f)(x), x @ dense, **tol)
    np.testing.assert_allclose(jax.lax.map(f, x), x @ dense, **tol)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    data = PartitionSpec("data")
    shared = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=data, out_specs=data))
    np.testing.assert_allclose(shared(x), x @ dense, **tol)

    def loss(implementation, mesh_loss):
        def of(values):
            def local(x, values):
                y = condensed_matmul(x, w.with_values(values), implementation=implementation)
                total = (y**2).sum()
                return jax.lax.psum(total, "data") if mesh_loss else total

            if not mesh_loss:
                return local(x, values)
            specs = dict(in_specs=(data, PartitionSpec()), out_specs=PartitionSpec())
            return jax.shard_map(local, mesh=mesh, **specs)(x, values)

        return jax.jit(jax.grad(of))(w.values)

    np.testing.assert_allclose(loss("cpu", True), loss("reference", False), **tol)


@built
@pytest.mark.parametrize("kind", ["condensed", "blocks"])
def test_second_derivatives_are_those_of_the_dense_product(kind):
    x, w, dense = small()
    multiply = condensed_matmul
    if kind == "blocks":
        multiply, w = (
            block_sparse_matmul,
            BlockSparse.from_dense(jnp.asarray(dense[:, :64], "f"), (32, 16)),
        )
    place = lambda v: w.with_values(v).to_dense()

    def second(product):
        first = jax.grad(lambda x, v: (product(x, v) ** 3).sum(), (0, 1))
        size = lambda x, v: sum((g**2).sum() for g in first(x, v))
        return jax.jit(jax.grad(size, (0, 1)))(x, w.values)

    ours = second(lambda x, v: multiply(x, w.with_values(v), implementation="cpu"))
    for a, b in zip(ours, second(lambda x, v: x @ place(v))):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.abs(b).max()))


@built
def test_it_is_not_chosen_where_xla_would_have_to_partition_it():
    x, w, _ = small()
    assert jax.device_count() > 1  # as everywhere in these tests
    assert "ffi_call" not in str(jax.make_jaxpr(lambda x: condensed_matmul(x, w))(x))
    named = lambda x: condensed_matmul(x, w, implementation="cpu")
    assert "ffi_call" in str(jax.make_jaxpr(named)(x))


@built
@pytest.mark.parametrize("row", [-1, 97])
def test_places_outside_of_the_matrix_are_refused(row):
    x, w, _ = small()
    w = Condensed(w.values, w.rows.at[3, 2].set(row), w.outputs, w.shape)
    with pytest.raises(Exception, match=r"rows must be in \[0, 96\]"):
        jax.block_until_ready(condensed_matmul(x, w, implementation="cpu"))


ONE_DEVICE = """
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import jax, jax.numpy as jnp
    from pallas_kernels import BlockSparse, Condensed, block_sparse_matmul, condensed_matmul
    w = Condensed.from_dense(jnp.eye(64))
    b = BlockSparse.from_dense(jnp.eye(64), (16, 16))
    x = jnp.ones((3, 64))
    for f in (lambda x: condensed_matmul(x, w), lambda x: block_sparse_matmul(x, b)):
        assert bool((f(x) == x).all())
        print("ffi_call" in str(jax.make_jaxpr(f)(x)))
for w in said:
    if "C++" in str(w.message):
        print(w.message)
"""


def one_device(**environment):
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **environment}
    run = [sys.executable, "-c", ONE_DEVICE]
    return subprocess.run(
        run, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()


@built
def test_it_is_chosen_on_one_device():
    assert one_device() == ["True", "True"]


def test_without_a_compiler_xla_serves_and_a_warning_says_so_once(tmp_path):
    *chosen, said = one_device(CXX="")
    assert chosen == ["False", "False"]
    assert "no C++ compiler was found" in said and "plain XLA" in said
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho cannot compile >&2\nexit 1\n")
    broken.chmod(0o755)
    *chosen, said = one_device(CXX=str(broken))
    assert chosen == ["False", "False"] and "cannot compile" in said


def test_named_without_a_compiler_it_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "")
    x, w, _ = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="'cpu' does not support.*no C\\+\\+ compiler"):
            condensed_matmul(x, w, implementation="cpu")


@built
def compile_kernels(program, *flags):
    """The kernels, called by a program of their own."""
    source = pathlib.Path(__file__).parent / "sanitized.cc"
    command = [cpu.compiler(), *cpu.FLAGS, *flags, "-pthread", f"-I{cpu.SOURCES}", source]
    subprocess.run([*command, "-o", program], check=True)


def largest_error(program):
    """Of the results of that program."""
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_sanitizers_find_nothing(sanitizer, tmp_path):
    flags = f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g"
    compile_kernels(tmp_path / "sanitized", *flags)
    assert largest_error(tmp_path / "sanitized") < 1e-3


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
@pytest.mark.parametrize(("march", "flag"), [("", "sse2"), ("-v3", "avx2"), ("-v4", "avx512f")])
def test_vectors_of_every_width_find_the_same(march, flag, tmp_path):
    compile_kernels(tmp_path / "program", f"-march=x86-64{march}")
    if flag not in pathlib.Path("/proc/cpuinfo").read_text().split():
        pytest.skip(f"compiled; this machine has no {flag} to run it")
    assert largest_error(tmp_path / "program") < 1e-3
