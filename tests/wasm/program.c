/* What an ordinary C program does: arguments, variables, files, directories, input and output. */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

int main(int argc, char **argv)
{
	char line[64];
	long sum = 0;
	int entries = 0;

	printf("%d %s %s\n", argc, argc > 1 ? argv[1] : "", getenv("HOME"));
	FILE *file = fopen("/work/out.txt", "w");
	if (file == NULL || mkdir("/tmp/made", 0700) != 0)
		return 3;
	fprintf(file, "written by C\n");
	fclose(file);
	while (fgets(line, sizeof line, stdin) != NULL)
		sum += strtol(line, NULL, 10);
	printf("sum %ld\n", sum);
	if (fopen("/etc/passwd", "r") != NULL)
		return 4;
	printf("passwd: %s\n", strerror(errno));
	DIR *directory = opendir("/work");
	while (directory != NULL && readdir(directory) != NULL)
		entries++;
	printf("entries %d\n", entries);
	fprintf(stderr, "said\n");
	return 5;
}
