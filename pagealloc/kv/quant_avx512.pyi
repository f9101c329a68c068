LOOPS: object
