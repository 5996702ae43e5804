"""Masks are part of the contract: a run that is restored with a newer version goes on as it would have."""

import json

import pytest
from golden_masks import FAMILIES, FILE, digests


def check(family, every):
    golden = json.loads(FILE.read_text())[family]
    differ = [i for i, found in digests(family, every) if found != golden[i]]
    assert not differ, f"cases of {family!r} whose masks differ: {differ}"


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_those_of_the_versions_before(family):
    check(family, every=3)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all_masks_are_those_of_the_versions_before(family):
    check(family, every=1)
