# Code cells in R (contexts.py): JSON lines in, JSON lines out. The warm R runner evaluates this text, a function.
#
# R can't move its descriptors, so it was started with the host's pipe as descriptor 3: `events`. What child processes
# and C code print goes where nobody listens. What R prints goes to a file, and from there out, after each expression.
function(input, events) {
    folder <- tempfile("cells")
    dir.create(folder)
    printed <- file.path(folder, "printed")
    sent <- 0
    sinking <- NULL
    pages <- 0L
    count <- 0L
    id <- "null"

    quoted <- function(text) {
        text <- iconv(enc2utf8(text), "UTF-8", "UTF-8", sub = "\ufffd")
        text <- gsub("\"", "\\\"", gsub("\\", "\\\\", text, fixed = TRUE), fixed = TRUE)
        for (code in 1:31) {
            mark <- intToUtf8(code)
            if (grepl(mark, text, fixed = TRUE)) text <- gsub(mark, sprintf("\\u%04x", code), text, fixed = TRUE)
        }
        paste0("\"", text, "\"")
    }
    send <- function(type, ...) {
        line <- charToRaw(paste0("{\"id\":", id, ",\"type\":\"", type, "\"", ..., "}\n"))
        suspendInterrupts({
            writeBin(line, events)
            flush(events)
        })
    }
    base64 <- function(bytes) {
        missing <- -length(bytes) %% 3L
        b <- matrix(as.integer(c(bytes, raw(missing))), 3L)
        sextets <- rbind(
            b[1L, ] %/% 4L, b[1L, ] %% 4L * 16L + b[2L, ] %/% 16L, b[2L, ] %% 16L * 4L + b[3L, ] %/% 64L, b[3L, ] %% 64L
        )
        text <- c(LETTERS, letters, 0:9, "+", "/")[sextets + 1L]
        text[length(text) + 1L - seq_len(missing)] <- "="
        paste(text, collapse = "")
    }

    restart <- function() {
        if (!is.null(sinking)) {
            sink()
            close(sinking)
        }
        sinking <<- file(printed, "wb")
        sent <<- 0
        sink(sinking)
    }
    take <- function() {
        flush(sinking)
        size <- file.size(printed)
        if (size <= sent) return("")
        source <- file(printed, "rb")
        on.exit(close(source))
        seek(source, sent)
        bytes <- readBin(source, "raw", size - sent)
        sent <<- size
        rawToChar(bytes[bytes != 0L])
    }
    pass_on <- function(text = take()) if (nzchar(text)) send("stdout", ",\"text\":", quoted(text))

    options(device = function(...) {
        pages <<- pages + 1L
        grDevices::png(file.path(folder, sprintf("%06d-%%04d.png", pages)), 800L, 600L, res = 100)
    })
    show_plots <- function() {
        grDevices::graphics.off()
        for (name in list.files(folder, "[.]png$", full.names = TRUE)) {
            bytes <- readBin(name, "raw", file.size(name))
            unlink(name)
            send("result", ",\"data\":{\"image/png\":\"", base64(bytes), "\"},\"is_main\":false")
        }
    }

    fail <- function(name, value, traceback = "") {
        pass_on()
        text <- paste(traceback, collapse = "\n")
        send("error", ",\"name\":", quoted(name), ",\"value\":", quoted(value), ",\"traceback\":", quoted(text))
    }
    # The calls of the cell, without those that run it and those that handle its error.
    calls_of <- function(calls) {
        texts <- vapply(calls, function(call) deparse(call, nlines = 1L)[1L], "")
        begin <- max(0L, which(texts == "eval(expressions[[i]], globalenv())"))
        end <- min(length(texts) + 1L, which(grepl("^([.]handleSimpleError|h)[(]|^[(]function [(]e[)]", texts)))
        texts[seq_along(texts) > begin & seq_along(texts) < end]
    }
    evaluate <- function(code) {
        expressions <- parse(text = code, keep.source = FALSE)
        for (i in seq_along(expressions)) {
            shown <- withVisible(eval(expressions[[i]], globalenv()))
            pass_on()
            if (shown$visible) {
                print(shown$value)
                text <- take()
                if (i < length(expressions)) pass_on(text)
                else if (nzchar(text)) {
                    send("result", ",\"data\":{\"text/plain\":", quoted(sub("\n$", "", text)), "},\"is_main\":true")
                }
            }
        }
    }
    run <- function(code) {
        traceback <- ""
        tryCatch(
            withCallingHandlers(
                allowInterrupts(evaluate(code)),
                message = function(m) {
                    pass_on()
                    send("stderr", ",\"text\":", quoted(conditionMessage(m)))
                    invokeRestart("muffleMessage")
                },
                warning = function(w) {
                    pass_on()
                    send("stderr", ",\"text\":", quoted(paste0("Warning: ", conditionMessage(w), "\n")))
                    invokeRestart("muffleWarning")
                },
                error = function(e) traceback <<- calls_of(sys.calls())
            ),
            # Also at the time limit, by the host: R's own does not end a sleep.
            interrupt = function(e) fail("KeyboardInterrupt", ""),
            error = function(e) fail(class(e)[1L], conditionMessage(e), traceback)
        )
        pass_on()
        show_plots()
    }

    # Leaving would end the context, and lose its variables: it is an error of the cell.
    leave <- function(save = "default", status = 0, runLast = TRUE) {
        stop(structure(class = c("SystemExit", "error", "condition"), list(message = format(status), call = NULL)))
    }
    for (name in c("quit", "q")) {
        unlockBinding(name, baseenv())
        assign(name, leave, baseenv())
        lockBinding(name, baseenv())
    }
    suspendInterrupts(repeat {
        line <- readLines(input, 1L, warn = FALSE)
        if (!length(line)) break
        # One that came between cells shows itself here, and is forgotten.
        tryCatch(allowInterrupts(Sys.sleep(1e-6)), interrupt = function(e) NULL)
        # {"id":1,"code":"...","timeout_s":null}, as the host writes it: a string of JSON is one of R.
        Encoding(line) <- "bytes"
        at <- regexpr(",\"code\":\"", line, fixed = TRUE)
        to <- max(gregexpr("\",\"timeout_s\":", line, fixed = TRUE)[[1L]])
        id <- substring(line, 7L, at - 1L)
        text <- substring(line, at + 9L, to - 1L)
        Encoding(text) <- "UTF-8"
        count <- count + 1L
        restart()
        code <- tryCatch(eval(parse(text = paste0("\"", text, "\""), encoding = "UTF-8")), error = identity)
        if (is.character(code)) run(code)
        else fail("SyntaxError", "the cell holds a character that R can't")
        send("done", ",\"execution_count\":", count)
    })
    unlink(folder, recursive = TRUE)
}
