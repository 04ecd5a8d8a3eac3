/* What gVisor's host has done in a guest with a network, by a process of its own, before and after it is saved. */
#pragma once

#include <stdbool.h>

/* Wait until no connection is being opened: such a one can't be saved. False if that takes more than a second. */
bool settle_wait(void);

/* Take addresses that the guest had where it was saved from its card. False, with errno, if one can't be taken. */
bool settle_forget(int count, char **addresses);
