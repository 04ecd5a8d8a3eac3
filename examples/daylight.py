"""What `make hello` runs in the sandbox: a year of daylight, read from standard input, with numpy and pandas."""

import sys

import numpy as np
import pandas as pd

days = pd.read_csv(sys.stdin, parse_dates=["date"])
# Daylight over a year is nearly a sine wave: fit it to each city, and compare its height with the latitude.
days["turn"] = 2 * np.pi * days["date"].dt.day_of_year / 365
rows = []
for city, year in days.groupby("city"):
    waves = np.column_stack([np.ones(len(year)), np.sin(year["turn"]), np.cos(year["turn"])])
    (mean, sine, cosine), *_ = np.linalg.lstsq(waves, year["daylight_min"], rcond=None)
    longest = year.loc[year["daylight_min"].idxmax()]
    rows.append((city, longest["latitude"], mean / 60, np.hypot(sine, cosine) / 60, f"{longest['date']:%d %b}"))
table = pd.DataFrame(rows, columns=["city", "latitude", "mean h", "swing h", "longest day"])
table = table.sort_values("latitude", key=abs)
print(table.to_string(index=False, float_format="{:.1f}".format))
print(f"correlation of swing with |latitude|: {np.corrcoef(table['latitude'].abs(), table['swing h'])[0, 1]:.2f}")
