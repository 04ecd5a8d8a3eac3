/* Stands in for the agent in the runner's tests: hands the runner's socket to the test, and reports its end.
 * usage: stub_agent agent --channel=3 --runner=N --runner-pid=PID [--shared-pids] */
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv) {
    int runner = -1;
    char words[4096] = "";
    for (int i = 0; i < argc; i++) {
        (void)sscanf(argv[i], "--runner=%d", &runner);
        strncat(words, argv[i], 200);
        strcat(words, " ");
    }
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    char control[CMSG_SPACE(sizeof(int))];
    struct iovec data = {words, strlen(words)};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(rights), &runner, sizeof(int));
    if (sendmsg(3, &message, 0) < 0) return 1;
    close(runner);
    int end[2];
    while ((end[0] = waitpid(-1, &end[1], 0)) > 0)
        if (write(3, end, sizeof end) != sizeof end) return 2;
    return 0;
}
