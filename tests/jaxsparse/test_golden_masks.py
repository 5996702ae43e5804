"""Masks are part of the contract: a run that is restored with a newer version goes on as it would have."""

import json

import pytest
from golden_masks import FAMILIES, FILE, digests


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_those_of_the_versions_before(family):
    golden, found = json.loads(FILE.read_text())[family], digests(family)
    differ = [i for i, (one, other) in enumerate(zip(golden, found, strict=True)) if one != other]
    assert not differ, f"cases of {family!r} whose masks differ: {differ}"
