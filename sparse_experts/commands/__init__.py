"""The commands, a file each: its flags and what it prints.

A command is a module with `run(args)`, which may return an exit code, and maybe
`add_arguments(parser)` for flags of its own. `args.bindings` has the overrides
`NAME=VALUE` of --gin.NAME=VALUE. Imports of weight go into functions, so that a
command starts with what it needs and no more.
"""
