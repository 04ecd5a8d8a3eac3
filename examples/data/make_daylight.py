"""Write daylight.csv: sunrise, sunset and length of day of six cities for each day of 2025.

The figures are computed, not measured: the low-accuracy solar position equations of the NOAA Global Monitoring
Laboratory's solar calculator (after Jean Meeus, Astronomical Algorithms), good to about a minute at these
latitudes. Coordinates are rounded to a tenth of a degree. Facts and formulas are in the public domain.

    python3 make_daylight.py > daylight.csv
"""

from __future__ import annotations

import csv
import math
import sys
from datetime import date, timedelta

CITIES = (
    ("Quito", -0.2, -78.5),
    ("Nairobi", -1.3, 36.8),
    ("Sydney", -33.9, 151.2),
    ("Athens", 38.0, 23.7),
    ("Berlin", 52.5, 13.4),
    ("Reykjavik", 64.1, -21.9),
)
YEAR = 2025
# The sun's centre at rise and set: half its disc and the air's refraction below the horizon.
ZENITH_DEG = 90.833


def declination_and_equation(day: date) -> tuple[float, float]:
    """The sun's declination (radians) and the equation of time (minutes) at noon UTC."""
    century = (day.toordinal() - date(2000, 1, 1).toordinal()) / 36525
    mean_long = math.radians((280.46646 + century * (36000.76983 + century * 0.0003032)) % 360)
    anomaly = math.radians(357.52911 + century * (35999.05029 - 0.0001537 * century))
    eccentricity = 0.016708634 - century * (0.000042037 + 0.0000001267 * century)
    centre = math.radians(
        math.sin(anomaly) * (1.914602 - century * (0.004817 + 0.000014 * century))
        + math.sin(2 * anomaly) * (0.019993 - 0.000101 * century)
        + math.sin(3 * anomaly) * 0.000289
    )
    node = math.radians(125.04 - 1934.136 * century)
    apparent = mean_long + centre - math.radians(0.00569 + 0.00478 * math.sin(node))
    obliquity = math.radians(23.439291 - 0.0130042 * century + 0.00256 * math.cos(node))
    declination = math.asin(math.sin(obliquity) * math.sin(apparent))
    y = math.tan(obliquity / 2) ** 2
    equation = (
        y * math.sin(2 * mean_long)
        - 2 * eccentricity * math.sin(anomaly)
        + 4 * eccentricity * y * math.sin(anomaly) * math.cos(2 * mean_long)
        - 0.5 * y * y * math.sin(4 * mean_long)
        - 1.25 * eccentricity**2 * math.sin(2 * anomaly)
    )
    return declination, 4 * math.degrees(equation)


def clock(minutes: float) -> str:
    """Minutes after midnight UTC as HH:MM, on whatever day that is."""
    whole = round(minutes) % 1440
    return f"{whole // 60:02}:{whole % 60:02}"


def main() -> None:
    """Write one row for each city and day."""
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(("date", "city", "latitude", "longitude", "sunrise_utc", "sunset_utc", "daylight_min"))
    for city, latitude, longitude in CITIES:
        for offset in range(365):
            day = date(YEAR, 1, 1) + timedelta(days=offset)
            declination, equation = declination_and_equation(day)
            angle = math.radians(latitude)
            cosine = math.cos(math.radians(ZENITH_DEG)) / (math.cos(angle) * math.cos(declination))
            half_day = 4 * math.degrees(math.acos(cosine - math.tan(angle) * math.tan(declination)))
            noon = 720 - 4 * longitude - equation
            times = clock(noon - half_day), clock(noon + half_day)
            out.writerow((day, city, latitude, longitude, *times, f"{2 * half_day:.1f}"))


if __name__ == "__main__":
    main()
