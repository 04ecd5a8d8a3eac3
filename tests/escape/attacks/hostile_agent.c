/*
 * What a guest agent would send that an attacker wrote. It is started in the agent's place, in a real
 * sandbox, and writes to its channel the bytes that the test has put into `said` (the marks are how the
 * test finds the places): a greeting when the host greets, the rest when it asks for something, over and
 * over when told to, until the channel closes.
 */
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <unistd.h>

enum { CHANNEL = 3, ROOM = 1 << 18 };

struct script {
	char mark[16];
	uint32_t greeting, size, rounds;
	unsigned char said[ROOM];
};

static volatile struct script script = {"TARTARUS-SCRIPT", 0, 0, 1, {1}};

static void say(uint32_t at, uint32_t end)
{
	while (at < end) {
		ssize_t n = write(CHANNEL, (const void *)(script.said + at), end - at);
		if (n < 0 && errno != EINTR && errno != EAGAIN)
			_exit(0);
		if (n > 0)
			at += (uint32_t)n;
	}
}

/* Wait until the host says something; what it says does not matter to us. */
static void hear(void)
{
	char heard[65536];
	struct pollfd channel = {CHANNEL, POLLIN, 0};

	poll(&channel, 1, -1);
	if (read(CHANNEL, heard, sizeof heard) == 0)
		_exit(0);
}

int main(void)
{
	hear();
	say(0, script.greeting);
	if (script.greeting < script.size)
		hear();
	for (uint32_t round = 0; round < script.rounds; round++)
		say(script.greeting, script.size);
	for (;;)
		hear();
}
