/* How fast this host's time stamp counter runs: an emulated machine has the same one, and finds out badly. */
#ifndef TARTARUS_TICKS_H
#define TARTARUS_TICKS_H

/* Prints kHz (0 where there is no such counter); an exit status. */
int ticks_main(void);

#endif
