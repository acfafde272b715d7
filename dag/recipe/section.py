"""The base of every section of a recipe."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A group of keys. It is frozen, and refuses unknown keys, infinity and NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def changed(self, *keys: str) -> list[str]:
        """Those of the keys whose value is not the default."""
        return [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]

    @model_validator(mode="before")
    @classmethod
    def _no_boolean_as_number(cls, data: Any) -> Any:
        """Refuse true and false for a key that wants a number; pydantic would read them as 1 and 0."""
        for key, value in data.items() if isinstance(data, dict) else ():
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and field is not None and not _is_switch(field.annotation):
                raise ValueError(f"{key} is not a switch: true and false do not belong there")
        return data


def _is_switch(annotation: Any) -> bool:
    """Whether a key may be true."""
    return annotation is bool or any(value is True for value in get_args(annotation))
