"""Installs espl_jax; its metadata is in pyproject.toml. The configurations are shipped as espl_jax.configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["espl_jax", "espl_jax.*"]), "espl_jax.configs"],
    package_dir={"espl_jax.configs": "configs"},
)
