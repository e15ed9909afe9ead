"""Intervals of proportions, by formula: no sampling, nothing imported, right at 0 and at 1."""


def wilson_interval(successes: float, trials: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927), 95 % by default.

    `successes` may hold halves, for ties: the interval is then somewhat too wide, because a half
    varies less than a win or a loss. trials has to be 1 or more.
    """
    share = successes / trials
    middle = share + z * z / (2 * trials)
    spread = z * (share * (1 - share) / trials + z * z / (4 * trials**2)) ** 0.5
    scale = 1 + z * z / trials
    return (middle - spread) / scale, (middle + spread) / scale
