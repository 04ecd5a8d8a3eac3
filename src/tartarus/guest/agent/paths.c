/* See paths.h. */
#include "paths.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_openat2
#define SYS_openat2 437
#endif

/* From linux/openat2.h, which older systems lack. */
struct how {
	uint64_t flags, mode, resolve;
};
enum { NO_MAGIC_LINKS = 2 };

int get_path(struct cursor *payload, char path[PATH_MAX])
{
	int status = copy_path(get_string(payload), path, PATH_MAX);

	return status != 0 ? status : path[0] == '/' ? 0 : -EINVAL;
}

int open_at(int dir, const char *path, int flags, mode_t mode)
{
	static bool without_openat2;
	struct how how = {(uint64_t)(unsigned)(flags | O_CLOEXEC), (flags & O_CREAT) != 0 ? mode : 0, NO_MAGIC_LINKS};
	int fd;

	if (!without_openat2) {
		fd = (int)syscall(SYS_openat2, dir, path, &how, sizeof how);
		if (fd >= 0 || errno != ENOSYS)
			return fd >= 0 ? fd : -errno;
		without_openat2 = true;
	}
	fd = openat(dir, path, flags | O_CLOEXEC, mode);
	return fd >= 0 ? fd : -errno;
}

/* Go down one step, making it when told to and it is missing. Closes `dir`. */
static int step_down(int dir, const char *name, bool make)
{
	if (make && mkdirat(dir, name, 0755) != 0 && errno != EEXIST) {
		int error = errno;
		close(dir);
		return -error;
	}
	int next = open_at(dir, name, O_PATH | O_DIRECTORY, 0);
	close(dir);
	return next;
}

/* The directory part of `path`, which this function takes apart. */
static int open_directory(char *path, bool make)
{
	int dir = open_at(AT_FDCWD, make ? "/" : path, O_PATH | O_DIRECTORY, 0);

	if (!make)
		return dir;
	for (char *name = path; dir >= 0; name += strlen(name) + 1) {
		name += strspn(name, "/");
		if (*name == '\0')
			break;
		size_t length = strcspn(name, "/");
		bool last = name[length] == '\0';
		name[length] = '\0';
		dir = step_down(dir, name, true);
		if (last)
			break;
	}
	return dir;
}

int place_open(struct place *place, const char *path, bool make)
{
	char directory[PATH_MAX];
	size_t end = strlen(path);

	place->dir = -1;
	while (end > 1 && path[end - 1] == '/')
		end--;
	size_t start = end;
	while (start > 0 && path[start - 1] != '/')
		start--;
	size_t length = end - start;
	if (length == 0 || (length == 1 && path[start] == '.') || (length == 2 && memcmp(path + start, "..", 2) == 0))
		return -EINVAL;
	if (length > NAME_MAX)
		return -ENAMETOOLONG;
	memcpy(directory, path, start);
	directory[start] = '\0';
	memcpy(place->name, path + start, length);
	place->name[length] = '\0';
	int dir = open_directory(directory, make);
	if (dir < 0)
		return dir;
	place->dir = dir;
	return 0;
}

void place_close(struct place *place)
{
	if (place->dir >= 0)
		close(place->dir);
	place->dir = -1;
}

int make_directory(const char *path, mode_t mode, bool parents)
{
	struct place place;
	struct stat info;
	int status = place_open(&place, path, parents);

	if (status != 0)
		return status;
	if (mkdirat(place.dir, place.name, mode & 07777) != 0)
		status = -errno;
	if (status == -EEXIST && parents && fstatat(place.dir, place.name, &info, 0) == 0 && S_ISDIR(info.st_mode))
		status = 0;
	place_close(&place);
	return status;
}
