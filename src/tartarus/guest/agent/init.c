/*
 * From the kernel's hand-over to the agent: load the modules the initramfs brings, put the root together
 * (read-only image below, scratch disk above), move into it, find the channel's port. The machine has nothing
 * to lose, so the first thing that fails switches it off, after a line on the console that says what it was.
 */
#include "init.h"

#include "agent.h"
#include "cmdline.h"
#include "harden.h"
#include "listen.h"
#include "machine.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MODULE_LIST "/modules.list"
#define MORE_MODULES "/more-modules.list"
#define PORT_NAME "tartarus.channel"
#define ROOT_SERIAL "tartarus-root"
#define SCRATCH_SERIAL "tartarus-scratch"
#define BINDS "/sandbox/binds"

enum { WAIT_STEPS = 20000, WAIT_STEP_NS = 500000, NAME_SIZE = 64, PATH_SIZE = 320 };

static bool powers_off;

static void switch_off(void)
{
	(void)syscall(SYS_setresuid, (uid_t)-1, 0, (uid_t)-1);
	sync();
	/* Most monitors are told to end rather than to reboot. */
	reboot(powers_off ? RB_POWER_OFF : RB_AUTOBOOT);
	for (;;)
		pause();
}

static void fail(const char *what)
{
	dprintf(2, "tartarus-guest init: %s: %s\n", what, strerror(errno));
	switch_off();
}

static void must_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data)
{
	if (mount(source, target, type, flags, data) != 0)
		fail(target);
}

static void load_module(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST))
		fail(path);
	close(fd);
}

static void load_modules(const char *listing)
{
	char path[PATH_SIZE];
	FILE *list = fopen(listing, "re");

	if (list == NULL)
		fail(listing);
	while (fgets(path, sizeof path, list) != NULL) {
		path[strcspn(path, "\n")] = '\0';
		if (path[0] != '\0')
			load_module(path);
	}
	fclose(list);
}

/* The first line of a small file, without its end. */
static bool read_line(const char *path, char *out, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, out, size - 1);

	if (fd >= 0)
		close(fd);
	if (n < 0)
		return false;
	out[n] = '\0';
	out[strcspn(out, "\n")] = '\0';
	return true;
}

/* Find the device below `directory` whose `attribute` reads `wanted`; its name goes to `name`. */
static bool find_device(const char *directory, const char *attribute, const char *wanted, char name[NAME_SIZE])
{
	DIR *listing = opendir(directory);
	struct dirent *entry;
	bool found = false;

	while (!found && listing != NULL && (entry = readdir(listing)) != NULL) {
		char path[PATH_SIZE + NAME_SIZE], value[NAME_SIZE];

		if (entry->d_name[0] == '.' || strlen(entry->d_name) >= NAME_SIZE)
			continue;
		snprintf(path, sizeof path, "%s/%s/%s", directory, entry->d_name, attribute);
		found = read_line(path, value, sizeof value) && strcmp(value, wanted) == 0;
		if (found)
			snprintf(name, NAME_SIZE, "%.63s", entry->d_name);
	}
	if (listing != NULL)
		closedir(listing);
	return found;
}

/* Devices appear when their driver has probed them: wait for this one, and for its file. */
static void device_path(const char *directory, const char *attribute, const char *wanted, char path[PATH_SIZE])
{
	const struct timespec step = {0, WAIT_STEP_NS};
	char name[NAME_SIZE];

	for (int i = 0; i < WAIT_STEPS; i++) {
		if (find_device(directory, attribute, wanted, name)) {
			snprintf(path, PATH_SIZE, "/dev/%s", name);
			if (access(path, F_OK) == 0)
				return;
		}
		nanosleep(&step, NULL);
	}
	errno = ENODEV;
	fail(wanted);
}

/* A disk's path: by what `disk.SERIAL=` on the command line names it, since not every monitor gives disks serials. */
static void disk_path(const char *serial, char path[PATH_SIZE])
{
	const struct timespec step = {0, WAIT_STEP_NS};
	char name[NAME_SIZE], word[2 * NAME_SIZE];

	snprintf(word, sizeof word, "disk.%.63s", serial);
	if (!cmdline_word(word, name, sizeof name)) {
		device_path("/sys/block", "serial", serial, path);
		return;
	}
	snprintf(path, PATH_SIZE, "/dev/%.63s", name);
	for (int i = 0; i < WAIT_STEPS && access(path, F_OK) != 0; i++)
		nanosleep(&step, NULL);
}

static void make_root(void)
{
	char disk[PATH_SIZE], scratch[PATH_SIZE];

	disk_path(ROOT_SERIAL, disk);
	disk_path(SCRATCH_SERIAL, scratch);
	(void)mkdir("/lower", 0755);
	(void)mkdir("/scratch", 0700);
	(void)mkdir("/root", 0755);
	must_mount(disk, "/lower", "erofs", MS_RDONLY | MS_NODEV, NULL);
	must_mount(scratch, "/scratch", "ext4", MS_NODEV | MS_NOATIME, "noinit_itable,nodiscard");
	(void)mkdir("/scratch/upper", 0755);
	(void)mkdir("/scratch/work", 0700);
	must_mount("overlay", "/root", "overlay", MS_NODEV | MS_NOATIME,
		   "lowerdir=/lower,upperdir=/scratch/upper,workdir=/scratch/work");
}

/* Images beside the root's own: lines of a disk's serial number and where it belongs. */
static void mount_binds(void)
{
	size_t size;
	char *text = read_all(BINDS, &size), *rest = text, *line;

	while (text != NULL && (line = strsep(&rest, "\n")) != NULL) {
		char disk[PATH_SIZE], place[PATH_SIZE];
		char *target = strchr(line, ' ');

		if (target == NULL)
			continue;
		*target = '\0';
		disk_path(line, disk);
		snprintf(place, sizeof place, "/root%s", target + 1);
		must_mount(disk, place, "erofs", MS_RDONLY | MS_NODEV | MS_NOSUID, NULL);
	}
	free(text);
}

static void furnish_root(const struct agent_config *config)
{
	static const char *const places[] = {"/root/proc", "/root/sys", "/root/dev", "/root/tmp", "/root/run"};
	static const char *const links[][2] = {
		{"pts/ptmx", "/root/dev/ptmx"},        {"/proc/self/fd", "/root/dev/fd"},
		{"/proc/self/fd/0", "/root/dev/stdin"}, {"/proc/self/fd/1", "/root/dev/stdout"},
		{"/proc/self/fd/2", "/root/dev/stderr"},
	};

	for (size_t i = 0; i < sizeof places / sizeof places[0]; i++)
		(void)mkdir(places[i], 0755);
	(void)chmod("/root/tmp", 01777);
	must_mount("/proc", "/root/proc", NULL, MS_MOVE, NULL);
	must_mount("/sys", "/root/sys", NULL, MS_MOVE, NULL);
	must_mount("/dev", "/root/dev", NULL, MS_MOVE, NULL);
	(void)mkdir("/root/dev/pts", 0755);
	(void)mkdir("/root/dev/shm", 01777);
	must_mount("devpts", "/root/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=5");
	must_mount("shm", "/root/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
	must_mount("run", "/root/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755");
	/* Memory, and its user's alone. */
	if (mkdir("/root/run/secrets", 0700) != 0 || chown("/root/run/secrets", config->uid, config->gid) != 0)
		fail("/run/secrets");
	/* devtmpfs knows none of these. */
	(void)unlink("/root/dev/ptmx");
	for (size_t i = 0; i < sizeof links / sizeof links[0]; i++)
		if (symlink(links[i][0], links[i][1]) != 0 && errno != EEXIST)
			fail(links[i][1]);
}

static void enter_root(void)
{
	if (chdir("/root") != 0 || mount(".", "/", NULL, MS_MOVE, NULL) != 0 || chroot(".") != 0 || chdir("/") != 0)
		fail("the new root");
}

/*
 * The name of the machine lies in memory: each clone is given another one before its first program runs, and to write
 * that to the disk would take longer than all else which makes a clone another machine.
 */
static void machine_id_in_memory(void)
{
	int fd = open("/run/machine-id", O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0444);
	int place = open("/etc/machine-id", O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0444);

	if (fd >= 0)
		close(fd);
	if (place >= 0)
		close(place);
	if (fd >= 0 && (place < 0 || mount("/run/machine-id", "/etc/machine-id", NULL, MS_BIND, NULL) != 0))
		(void)unlink("/run/machine-id");
}

static void loopback_up(void)
{
	struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP};
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) != 0)
		fail("loopback");
	close(fd);
}

/*
 * What programs write is to reach the scratch disk soon, where the host counts it: not after half a minute.
 * What crashes leaves no picture of its memory there, which may hold secrets: its helper can't be executed.
 */
static void set_knobs(void)
{
	static const char *const knobs[][2] = {
		{"/proc/sys/vm/dirty_writeback_centisecs", "100"},
		{"/proc/sys/vm/dirty_expire_centisecs", "200"},
		{"/proc/sys/kernel/core_pattern", "|/dev/null"},
	};

	for (size_t i = 0; i < sizeof knobs / sizeof knobs[0]; i++) {
		int fd = open(knobs[i][0], O_WRONLY | O_CLOEXEC);

		if (fd >= 0) {
			(void)!write(fd, knobs[i][1], strlen(knobs[i][1]));
			close(fd);
		}
	}
}

static void attach_null(void)
{
	int fd = open("/dev/null", O_RDWR);

	for (int i = 0; i < 3 && fd >= 0; i++)
		(void)dup2(fd, i);
	if (fd > 2)
		close(fd);
}

/* A port of the virtual console, or vsock where the monitor offers that. */
static void open_channel(struct agent_config *config)
{
	char path[PATH_SIZE] = "vsock";
	unsigned port = cmdline_number("tartarus.channel", "vsock");
	int fd;

	if (port != 0) {
		fd = listen_vsock(port);
	} else {
		device_path("/sys/class/virtio-ports", "name", PORT_NAME, path);
		fd = open(path, O_RDWR | O_CLOEXEC);
	}
	if (fd < 0)
		fail(path);
	int moved = fcntl(fd, F_DUPFD_CLOEXEC, 3);
	if (moved < 0)
		fail("the channel");
	close(fd);
	*(port != 0 ? &config->listen_fd : &config->channel_fd) = moved;
}

int init_main(void)
{
	struct agent_config config = {
		.channel_fd = -1, .listen_fd = -1, .runner_fd = -1, .group_fd = -1, .own_pid_namespace = true, .machine = true};
	char off[NAME_SIZE];

	(void)mkdir("/proc", 0755);
	(void)mkdir("/sys", 0755);
	(void)mkdir("/dev", 0755);
	must_mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	must_mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	if (mount("dev", "/dev", "devtmpfs", MS_NOSUID | MS_NOEXEC, "mode=755") != 0 && errno != EBUSY)
		fail("/dev");
	powers_off = cmdline_word("tartarus.off", off, sizeof off) && strcmp(off, "poweroff") == 0;
	load_modules(MODULE_LIST);
	/* Of hardware that only some machines have. */
	if (access(MORE_MODULES, F_OK) == 0)
		load_modules(MORE_MODULES);
	if (!user_read(&config))
		fail("the sandbox's user");
	make_root();
	mount_binds();
	companion_read();
	furnish_root(&config);
	enter_root();
	machine_id_in_memory();
	group_make(&config);
	loopback_up();
	set_knobs();
	open_channel(&config);
	harden_kernel();
	companion_start(&config);
	attach_null();
	/* Or each clone would begin by writing to its disk what is left of this. */
	sync();
	(void)agent_main(&config);
	switch_off();
	return 0;
}
