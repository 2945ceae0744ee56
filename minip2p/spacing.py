"""Which of the training timesteps a run visits. SD's own spacing is "leading"."""

from .check import check

SPACINGS = ("leading", "trailing", "linspace")


def spaced(steps: int, spacing: str, num_train_timesteps: int, steps_offset: int) -> list[int]:
    """Which training timesteps a run visits, noisiest first (Lin et al. 2024, table 2).

    leading: equal strides up from `steps_offset`, as SD has it, which leave out the noisiest.
    trailing: down from the noisiest, which suits few steps. linspace: from the noisiest to 0.
    """
    n = num_train_timesteps
    check(1 <= steps < n, f"The number of steps must be from 1 to {n - 1}, not {steps}.")
    names = ", ".join(SPACINGS)
    check(spacing in SPACINGS, f"The spacing of timesteps is one of {names}, not {spacing!r}.")
    if spacing == "leading":
        timesteps = [i * (n // steps) + steps_offset for i in reversed(range(steps))]
    elif spacing == "trailing":  # in numpy's arithmetic: halves are to fall on the same side
        stride = (n - n / steps) - n
        timesteps = [round(n + i * stride) - 1 for i in range(steps)]
    else:
        stride = (n - 1) / max(steps - 1, 1)
        timesteps = [round(i * stride) for i in reversed(range(steps))]
    within = timesteps[-1] >= 0 and timesteps[0] < n
    check(within, f"With steps_offset {steps_offset} the run would leave timesteps 0 to {n - 1}.")
    return timesteps
