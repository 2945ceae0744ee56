"""The progress bar, tqdm's: a line in a terminal, a widget in a notebook that can show one."""

import warnings

from tqdm import TqdmWarning

with warnings.catch_warnings():
    # A notebook without ipywidgets shows the line, and that is all right.
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm as tqdm
