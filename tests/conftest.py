"""Eight virtual CPU devices for every test, and a quiet, reproducible Hypothesis profile."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
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
