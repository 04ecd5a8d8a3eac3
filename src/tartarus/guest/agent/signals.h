/* Signals as a program expects to find them. */
#ifndef TARTARUS_SIGNALS_H
#define TARTARUS_SIGNALS_H

/* Give every signal its default action, whatever whoever started us had ignored: programs inherit that. */
void signals_to_default(void);

#endif
