/* The nursery's control socket: packets with descriptors from the host, and answers to them. */
#ifndef TARTARUS_PACKET_H
#define TARTARUS_PACKET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { CONTROL_FD = 3, PACKET_MAX = 192 * 1024, FDS_MAX = 64, STRINGS_MAX = 256 };

struct request {
	unsigned char *bytes;
	size_t size;
	int fds[FDS_MAX];
	size_t n_fds;
};

/* Receive one packet with its descriptors, close-on-exec. False when the host is gone. */
bool packet_receive(struct request *request);

/* Answer a request: an errno (0 is success), a pid or failed step, and a descriptor unless it is -1. */
void packet_answer(uint32_t seq, uint32_t error, int32_t value, int fd);

uint32_t u32_at(const unsigned char *bytes);

/*
 * Read a count and that many length-prefixed strings from *at, which moves on, into `out` (STRINGS_MAX places;
 * ends with NULL). Their bytes go to `pool`. False when malformed.
 */
bool read_strings(unsigned char **at, const unsigned char *end, char **out, char *pool, size_t pool_size);

#endif
