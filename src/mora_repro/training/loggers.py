def logger_callback(logger, spec, work):
    return None
