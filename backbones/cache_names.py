"""The cache's two names: `cache` as of transformers 5.24, and `past_key_values` before.

Here it is `cache`; the earlier name is understood wherever a caller may use it.
"""

import functools
from collections.abc import Callable
from typing import Any

from transformers import GenerationMixin
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.utils import ModelOutput

from tess.backbones.cache import HybridCache

EARLIER_NAME = "past_key_values"
GENERATION_NAME: str = ALL_CACHE_NAMES[0]
"""What the installed transformers calls the cache inside `generate`."""


def takes_either_name(name: str = "cache") -> Callable[[Callable], Callable]:
    """Decorate a method whose cache argument is `name`: callers may use either keyword.

    Raises:
        ValueError: from the method, where both are given.
    """

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = [key for key in ("cache", EARLIER_NAME) if kwargs.get(key) is not None]
            if len(given) == 2:
                raise ValueError(f"cache and {EARLIER_NAME} are one argument; got both")
            if given and given[0] != name:
                kwargs[name] = kwargs[given[0]]
            for key in {"cache", EARLIER_NAME} - {name}:
                kwargs.pop(key, None)
            return method(self, *args, **kwargs)

        return call

    return decorate


class CachedOutput(ModelOutput):
    """An output whose field `cache` has the name `past_key_values` too, as attribute and as key."""

    @property
    def past_key_values(self) -> HybridCache | None:
        """The cache."""
        return self.cache

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_today(key))

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_today(key))

    def get(self, key: str, default: Any = None) -> Any:
        """The field of this name, or `default` where it is None."""
        return super().get(_today(key), default)


class CachedGenerationMixin(GenerationMixin):
    """`generate()` under either name of the cache, whichever the installed transformers has."""

    generate = takes_either_name(GENERATION_NAME)(GenerationMixin.generate)
    prepare_inputs_for_generation = takes_either_name(GENERATION_NAME)(
        GenerationMixin.prepare_inputs_for_generation
    )


def _today(key: Any) -> Any:
    return "cache" if key == EARLIER_NAME else key
