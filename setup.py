"""Installs espl_jax, with configs/ as espl_jax.configs; the metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["espl_jax", "espl_jax.*"]), "espl_jax.configs"],
    package_dir={"espl_jax.configs": "configs"},
)
