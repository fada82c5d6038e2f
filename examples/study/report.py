def write_report(study, out):
    pass
