/* Read anew for each word: a few words, once for each boot. */
#include "cmdline.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LINE_MAX_SIZE = 4096, WORD_MAX_SIZE = 64, NUMBER_BASE = 10 };

static size_t read_all(char *line, size_t size)
{
	int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
	size_t filled = 0;
	ssize_t n;

	while (fd >= 0 && filled < size - 1 && (n = read(fd, line + filled, size - 1 - filled)) > 0)
		filled += (size_t)n;
	if (fd >= 0)
		close(fd);
	line[filled] = '\0';
	return filled;
}

bool cmdline_word(const char *name, char *out, size_t size)
{
	char line[LINE_MAX_SIZE], *rest = line;
	size_t length = strlen(name);

	out[0] = '\0';
	(void)read_all(line, sizeof line);
	for (char *word; (word = strsep(&rest, " \n")) != NULL;) {
		if (strncmp(word, name, length) != 0 || word[length] != '=' || strlen(word + length + 1) >= size)
			continue;
		strcpy(out, word + length + 1);
		return true;
	}
	return false;
}

unsigned cmdline_number(const char *name, const char *prefix)
{
	char word[WORD_MAX_SIZE];
	size_t length = strlen(prefix);

	if (!cmdline_word(name, word, sizeof word) || strncmp(word, prefix, length) != 0 || word[length] != ':')
		return 0;
	return (unsigned)strtoul(word + length + 1, NULL, NUMBER_BASE);
}
