"""The flags of XLA under which tests and the processes that they start run."""


def xla_flags(devices):
    """Of a process with so many virtual CPU devices. Tests compile for longer than they run: at level 0 half
    as long."""
    return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
