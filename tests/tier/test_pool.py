import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.base.errors import PoolFull
from megalith.tier.pool import Lease, Pool


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60), st.booleans()), max_size=60))
def test_the_cap_holds_and_what_is_taken_and_given_back_balances(calls: list[tuple[str, int, bool]]) -> None:
    pool, leases, peak = Pool("host", 100), list[Lease](), 0
    for owner, num_bytes, give in calls:
        if give and leases:
            lease = leases.pop(num_bytes % len(leases))
            lease.release()
            lease.release()
        held = sum(lease.num_bytes for lease in leases)
        if held + num_bytes <= 100:
            leases.append(pool.take(owner, num_bytes))
        else:
            with pytest.raises(PoolFull):
                pool.take(owner, num_bytes)
        held = sum(lease.num_bytes for lease in leases)
        peak = max(peak, held)
        assert pool.used_bytes == held == sum(pool.owners().values()) <= 100
        assert pool.peak_bytes == peak


def test_a_full_pool_says_who_has_the_bytes() -> None:
    pool = Pool("host", 4096)
    with pool.take("weights", 3072), pool.take("cache", 1000):
        with pytest.raises(
            PoolFull,
            match=r"which has 24 B of 4\.00 KiB free \(weights 3\.00 KiB, cache 1000 B",
        ):
            pool.take("adapter", 2048)
        with pytest.raises(ValueError, match="-1"):
            pool.take("adapter", -1)
    assert pool.used_bytes == 0
    assert not pool.owners()
