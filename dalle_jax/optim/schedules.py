"""Schedules of the KL weight, the temperature and the learning rate, over updates.

Source: Ramesh et al. 2021, appendices A.2 and B.2.
"""

import optax


def cosine(start: float, end: float, steps: int) -> optax.Schedule:
    """Goes from start to end along half a cosine, then stays there.

    Args:
      start: value at update 0.
      end: value from update `steps` on.
      steps: updates the change takes; 0 for `end` from the beginning.
    Returns:
      v(t) = end + (start - end) * (1 + cos(pi * min(t / steps, 1))) / 2.
    Source: Ramesh et al. 2021, appendix A.2 ("all use a cosine schedule"); the hold at the end
      value is the author's for the KL weight and ours for the others.
    """
    if steps == 0:
        return optax.constant_schedule(end)
    falling = optax.cosine_decay_schedule(1.0, steps)
    return lambda count: end + (start - end) * falling(count)


def warm_up(peak: float, steps: int, after: optax.Schedule | None = None) -> optax.Schedule:
    """Rises linearly from 0 to peak, then follows `after`, whose count starts there.

    Args:
      peak: learning rate at the end of the warm-up.
      steps: updates the warm-up takes; 0 for none.
      after: what follows; constant at peak if not given.
    Source: Ramesh et al. 2021, appendix B.2 (the start at 0 is ours).
    """
    after = after or optax.constant_schedule(peak)
    if steps == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, steps), after], [steps])
