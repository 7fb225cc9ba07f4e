import pytest

from megalith.base.config import Config, convert
from megalith.base.errors import ConfigError


class Cache(Config):
    block_tokens: int = 16


class Recipe(Config):
    model: str
    cache: Cache = Cache()
    caches: dict[str, Cache] = {}


def test_an_unknown_key_names_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"block_tokns.*Did you mean `block_tokens`"):
        convert({"model": "x", "cache": {"block_tokns": 4}}, Recipe, "recipe.toml")


def test_a_wrong_type_names_the_place() -> None:
    with pytest.raises(ConfigError, match=r"recipe.toml.*\$\.cache\.block_tokens"):
        convert({"model": "x", "cache": {"block_tokens": "many"}}, Recipe, "recipe.toml")


def test_good_data_converts_and_is_frozen() -> None:
    recipe = convert({"model": "x", "caches": {"a": {"block_tokens": 32}}}, Recipe, "test")
    assert recipe.caches["a"].block_tokens == 32
    with pytest.raises(AttributeError):
        recipe.model = "y"  # type: ignore[misc]
