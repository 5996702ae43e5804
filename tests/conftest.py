"""Eight virtual CPU devices and a quick XLA for every test; a quiet, reproducible Hypothesis profile."""

import gc
import os
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and run little: without its optimizations XLA takes about half the time. On a GPU
# (`make test-gpu`) everything is as a user has it.
os.environ["XLA_FLAGS"] = " ".join((
    os.environ.get("XLA_FLAGS", ""),
    "" if "cuda" in os.environ["JAX_PLATFORMS"] else "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
    "--xla_force_host_platform_device_count=8",
))  # fmt: skip
# Threads of XLA's pool: on few cores, devices that wait for each other can hold all of them.
os.environ.setdefault("NPROC", "32")

from hypothesis import HealthCheck, settings

for name, examples in (("jaxsparse", 12), ("thorough", 50)):
    settings.register_profile(
        name,
        deadline=None,
        derandomize=True,
        max_examples=examples,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
settings.load_profile("jaxsparse")

# Traced programs are many long-lived objects; the collector would walk them all again and again.
gc.set_threshold(200_000, 50, 100)


# What has to hold on a GPU too: every kernel, the contracts of all methods, the training job.
FOR_GPU = re.compile(
    r"test_implementations\.py::Test\w+(GPU|XLA|Reference)\b"
    r"|pallas_kernels/test_\w+_on_gpu\.py"
    r"|jaxsparse/test_contracts\.py"
    r"|experiments/test_train\.py::test_a_run_writes"
)


def pytest_collection_modifyitems(items):
    for item in items:
        if FOR_GPU.search(item.nodeid):
            item.add_marker("gpu")
