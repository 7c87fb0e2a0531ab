"""XLA flags for tests and the processes that they start."""

OLDER_EMITTERS = "--xla_cpu_use_fusion_emitters=false"


def xla_flags(devices, libtpu=False):
    """Returns XLA's flags for a process with that number of virtual CPU devices.

    Tests compile for longer than they run. Level 0 halves that; older emitters take a quarter of the rest.
    A process that loads libtpu must not have their flag, which libtpu does not know.
    """
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return flags if libtpu else f"{flags} {OLDER_EMITTERS}"
