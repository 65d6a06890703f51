"""What the parser states without MLX is what the modules behind it accept."""

from mlx_simpo.cli.arguments import DTYPES
from mlx_simpo.cli.fuse import FORMATS
from mlx_simpo.convert import fuse
from mlx_simpo.model import loading


def test_the_dtypes_are_those_that_models_are_loaded_in() -> None:
    assert tuple(loading.DTYPES) == DTYPES


def test_the_formats_are_those_that_fuse_writes() -> None:
    assert fuse.__globals__["FORMATS"] == FORMATS  # the function hides the module of its name
