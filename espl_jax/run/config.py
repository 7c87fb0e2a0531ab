"""The type of a run's configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

if TYPE_CHECKING:

    class Config(ConfigDict):
        """The fields that configs/common.py defines and documents."""

        def __getattr__(self, name: str) -> Any: ...

        def __getitem__(self, name: str) -> Any: ...

else:
    Config = ConfigDict
