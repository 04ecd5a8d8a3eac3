# The warm R runner: an interpreter that has loaded a template's packages, and waits for one program.
#
# The host writes this text to a file of its own, FILE, and starts `Rscript FILE`, with messages on standard input
# (tartarus/guest/parked.py has the format): first what to warm up, and when that is done one byte, ACK, goes to
# standard output; then what to run, and another ACK, after which standard input and output are the program's. NAK and
# a reason instead mean: this needs an interpreter of its own.
#
# R reads FILE line by line and runs each expression as it is complete. The one below waits for the program, appends it
# to FILE and returns: so R goes on with the program exactly as if FILE had begun with it. What it prints, how it fails,
# what is visible, and what stdin() means are R's own doing.
#
# `Rscript FILE --cells` waits for code cells instead (cells.R, which comes as the program): everything that is for the
# host then goes to descriptor 3.
local({
    ack <- "\006"
    nak <- "\025"
    begun <- commandArgs()
    at <- grep("^--file=", begun)[1L]
    own <- sub("^--file=", "", begun[at])
    # Not `stdin()`: that is FILE itself. This one has a buffer of its own, empty again when the program gets its turn.
    input <- file("stdin", "rb")
    events <- if ("--cells" %in% commandArgs(TRUE)) file("/proc/self/fd/3", "wb")
    say <- function(...) {
        if (is.null(events)) {
            cat(..., sep = "")
            flush(stdout())
        } else {
            writeBin(charToRaw(paste0(...)), events)
            flush(events)
        }
    }
    leave <- function(...) {
        unlink(own)
        say(...)
        quit("no", 0L, FALSE)
    }
    words <- character()
    receive <- function() {
        head <- readBin(input, "integer", 2L, 4L, endian = "little")
        if (length(head) < 2L) leave() # the host has no use for it any more
        words <<- readBin(readBin(input, "raw", head[1L]), "character", head[2L])
    }
    one <- function() {
        word <- words[1L]
        words <<- words[-1L]
        word
    }
    some <- function() {
        count <- as.integer(one())
        taken <- words[seq_len(count)]
        if (count) words <<- words[-seq_len(count)]
        taken
    }

    receive()
    for (name in some()) suppressPackageStartupMessages(loadNamespace(name))
    script <- one()
    if (nzchar(script)) eval(parse(text = script), new.env(parent = globalenv()))
    # Numbers drawn by the warm-up are nobody's business: the program's generator starts from the clock, as ever.
    if (exists(".Random.seed", globalenv(), inherits = FALSE)) rm(".Random.seed", envir = globalenv())
    invisible(gc(FALSE))
    say(ack)

    receive()
    directory <- one()
    one() # whether there will be input: without, it is at its end
    mode <- one()
    program <- one()
    one() # an option of Node.js
    unset <- some()
    set <- some()
    arguments <- some()
    if (length(unset)) Sys.unsetenv(unset)
    if (length(set)) {
        name <- sub("=.*", "", set)
        do.call(Sys.setenv, structure(as.list(substring(set, nchar(name) + 2L)), names = name))
    }
    if (inherits(try(setwd(directory), silent = TRUE), "try-error")) leave(nak, "no such directory")
    profiles <- c(".Rprofile", ".Renviron", "~/.Rprofile", "~/.Renviron")
    if (any(file.exists(profiles))) leave(nak, "a profile has to be read first")
    # R keeps its arguments where nobody can change them, so the function that tells them is replaced.
    told <- eval(bquote(function(trailingOnly = FALSE) {
        args <- .(c(begun[seq_len(at - 1L)], arguments))
        if (trailingOnly) {
            m <- match("--args", args, 0L)
            if (m) args[-seq_len(m)] else character()
        } else args
    }), baseenv())
    unlockBinding("commandArgs", baseenv())
    assign("commandArgs", told, baseenv())
    lockBinding("commandArgs", baseenv())
    if (mode == "context") {
        unlink(own)
        serve <- eval(parse(text = program, keep.source = FALSE), globalenv())
        leave <- quit
        say(ack)
        serve(input, events)
        leave("no", 0L, FALSE)
    }
    if (mode == "file") {
        if (!file_test("-f", program) || file.access(program, 4L) != 0L) leave(nak, "no such script")
        if (!file.append(own, program)) leave(nak, "the script can not be copied")
    } else {
        out <- file(own, "ab")
        writeBin(c(charToRaw(program), as.raw(10L)), out)
        close(out)
    }
    unlink(own)
    close(input)
    say(ack)
    invisible(NULL)
})
