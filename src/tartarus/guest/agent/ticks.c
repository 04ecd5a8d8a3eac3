/* See ticks.h. */
#include "ticks.h"

#include <stdint.h>
#include <stdio.h>
#include <time.h>

enum { MEASURE_NS = 20000000 };

#ifdef __x86_64__
static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC_RAW, &now);
	return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static uint64_t ticks_khz(void)
{
	const struct timespec pause = {0, MEASURE_NS};
	int64_t began = now_ns();
	uint64_t ticks = __builtin_ia32_rdtsc();

	nanosleep(&pause, NULL);
	ticks = __builtin_ia32_rdtsc() - ticks;
	return ticks * 1000000 / (uint64_t)(now_ns() - began);
}
#else
static uint64_t ticks_khz(void)
{
	return 0;
}
#endif

int ticks_main(void)
{
	return printf("%llu\n", (unsigned long long)ticks_khz()) < 0;
}
