/* A machine's network card: the address that the host gives it, and no other. */
#ifndef TARTARUS_CARD_H
#define TARTARUS_CARD_H

#include "frame.h"

#include <stdbool.h>

/* IPv4 addresses of four bytes. Its addresses of before go first. */
bool card_join(struct span address, struct span gateway, uint32_t mtu);

#endif
