/* See runner.h. */
#include "runner.h"

bool runner_attach(struct session *session)
{
	(void)session;
	return true;
}

bool runner_offer(struct session *session, struct exec *exec)
{
	(void)session;
	(void)exec;
	return false;
}

void runner_forget(struct session *session, struct exec *exec)
{
	(void)session;
	(void)exec;
}

void runner_drain(struct session *session)
{
	(void)session;
}

void runner_reaped(struct session *session)
{
	(void)session;
}
