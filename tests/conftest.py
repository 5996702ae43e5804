"""Eight virtual CPU devices and a quick XLA for every test; a quiet, reproducible Hypothesis profile."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and run little: without its optimizations XLA takes about half the time.
os.environ["XLA_FLAGS"] = " ".join((
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
    "--xla_force_host_platform_device_count=8",
))  # fmt: skip
# Threads of XLA's pool: on few cores, devices that wait for each other can hold all of them.
os.environ.setdefault("NPROC", "32")

from hypothesis import HealthCheck, settings

settings.register_profile(
    "jaxsparse",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("jaxsparse")
