/* See fixup.h. What the sandbox may not do (set a clock, credit entropy) is left undone and said so. */
#include "fixup.h"

#include "card.h"
#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { CLOCK_SET = 1, ENTROPY_CREDITED = 2, ENTROPY_MIXED = 4, NAMED = 8, MACHINE_ID_SET = 16,
       LIMITED = 32, JOINED = 64, ENTROPY_MAX = 4096 };
enum { HOSTNAME_MAX = 64, MACHINE_ID_SIZE = 32 };

static uint32_t set_clock(uint64_t unix_ns)
{
	struct timespec time = {(time_t)(unix_ns / 1000000000), (long)(unix_ns % 1000000000)};

	return unix_ns != 0 && clock_settime(CLOCK_REALTIME, &time) == 0 ? CLOCK_SET : 0;
}

static uint32_t add_entropy(struct span entropy)
{
	_Alignas(struct rand_pool_info) uint8_t bytes[sizeof(struct rand_pool_info) + ENTROPY_MAX];
	struct rand_pool_info *pool = (struct rand_pool_info *)(void *)bytes;
	uint32_t done = 0;

	if (entropy.size == 0)
		return 0;
	int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	pool->entropy_count = (int)entropy.size * 8;
	pool->buf_size = (int)entropy.size;
	memcpy(bytes + sizeof *pool, entropy.bytes, entropy.size);
	/* Without a reseed the kernel's generator goes on from the state that all clones have, for up to a minute. */
	if (ioctl(fd, RNDADDENTROPY, pool) == 0 && ioctl(fd, RNDRESEEDCRNG) == 0)
		done = ENTROPY_CREDITED;
	else if (write(fd, entropy.bytes, entropy.size) == (ssize_t)entropy.size)
		done = ENTROPY_MIXED;
	close(fd);
	return done;
}

static uint32_t set_hostname(struct span name)
{
	return name.size > 0 && sethostname((const char *)name.bytes, name.size) == 0 ? NAMED : 0;
}

static uint32_t set_machine_id(struct span machine_id)
{
	char line[MACHINE_ID_SIZE + 1] = {[MACHINE_ID_SIZE] = '\n'};
	struct stat status;
	uint32_t done = 0;

	if (machine_id.size != MACHINE_ID_SIZE)
		return 0;
	int fd = open("/etc/machine-id", O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0444);
	/* Nobody may write to it, not even its owner, unless that is a privileged one. */
	if (fd < 0 && errno == EACCES && unlink("/etc/machine-id") == 0)
		fd = open("/etc/machine-id", O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0444);
	if (fd < 0)
		return 0;
	/* In place: to shorten a file first takes a file system much longer. */
	memcpy(line, machine_id.bytes, machine_id.size);
	if (fstat(fd, &status) == 0 && (status.st_size <= (off_t)sizeof line || ftruncate(fd, 0) == 0) &&
	    pwrite(fd, line, sizeof line, 0) == (ssize_t)sizeof line)
		done = MACHINE_ID_SET;
	close(fd);
	return done;
}

/* FREEZE: stand all programs still, or let them go on. */
int serve_freeze(struct session *session, struct cursor *payload)
{
	bool on = get_u32(payload) != 0;

	if (!cursor_done(payload))
		return -EPROTO;
	act_as_root(&session->config);
	bool done = session->config.machine && group_freeze(on);
	act_as_user(&session->config);
	out_u32(session, F_FROZEN, 0, done);
	return 0;
}

int serve_fixup(struct session *session, uint32_t id, struct cursor *payload)
{
	uint64_t unix_ns = get_u64(payload);
	struct span entropy = get_string(payload);
	struct span name = {NULL, 0}, machine_id = {NULL, 0};

	struct span address = {NULL, 0}, gateway = {NULL, 0};
	uint32_t tasks = 0, mtu = 0, done;
	uint64_t memory = 0;

	if (!cursor_done(payload)) {
		name = get_string(payload);
		machine_id = get_string(payload);
	}
	if (!cursor_done(payload)) {
		tasks = get_u32(payload);
		memory = get_u64(payload);
	}
	if (!cursor_done(payload)) {
		address = get_string(payload);
		gateway = get_string(payload);
		mtu = get_u32(payload);
	}
	if (!cursor_done(payload) || entropy.size > ENTROPY_MAX || name.size > HOSTNAME_MAX)
		return -EPROTO;
	act_as_root(&session->config);
	done = set_clock(unix_ns) | add_entropy(entropy) | set_hostname(name) | set_machine_id(machine_id);
	if (tasks > 0 && session->config.machine && group_limit(tasks, memory))
		done |= LIMITED;
	if (address.size > 0 && session->config.machine && card_join(address, gateway, mtu))
		done |= JOINED;
	/* It is somebody else now, and may know it. */
	if (session->config.machine && name.size > 0)
		(void)group_freeze(false);
	act_as_user(&session->config);
	out_u32(session, F_RESULT, id, done);
	return 0;
}
