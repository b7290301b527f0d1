"""Ranges of numbers in recipes."""

from __future__ import annotations

from typing import Any

from attrs import validators

positive: Any = validators.gt(0)
natural: Any = validators.ge(0)
share: Any = validators.and_(validators.ge(0.0), validators.le(1.0))
