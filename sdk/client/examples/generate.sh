#!/bin/sh
# Looks at the daemon and lets it draw, with busctl of systemd alone.
#
#     generate.sh "a cat on the beach" [BUS_ADDRESS]
#
# BUS_ADDRESS is that of a message bus or of the daemon's own socket (unix:path=/run/user/1000/blocklora/bus); without
# it the session bus is used. Pictures are file descriptors, which a shell cannot take: it asks for the job's state.
set -eu
prompt=$1
address=${2:-$DBUS_SESSION_BUS_ADDRESS}

daemon() { busctl --address="$address" --timeout=600 "$@"; }
name=org.blocklora.Daemon1
path=/org/blocklora/Daemon1

daemon get-property $name $path $name.Manager Version
daemon get-property $name $path $name.Manager Samplers

# Generate(o target, a{sv} params, a{sv} options) -> o job. A job lives as long as its caller's connection unless it is
# told otherwise, and every run of busctl is a connection.
job=$(daemon call $name $path $name.Manager Generate 'oa{sv}a{sv}' / 2 prompt s "$prompt" steps u 5 1 lifetime s daemon |
    cut -d '"' -f 2)
echo "job $job"
daemon call $name "$job" $name.Job Wait
daemon get-property $name "$job" $name.Job State
