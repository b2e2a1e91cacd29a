#!/bin/busybox sh
# First program of the guest: makes the host's files its root, with writes going to memory.
# A failure here ends in a panic, because process 1 exits; the host shows the console.
set -e
bb=/bin/busybox

$bb mount -t devtmpfs dev /dev
$bb mount -t proc proc /proc
$bb mount -t sysfs sys /sys
while read -r module; do
    $bb insmod "/modules/$module"
done </modules/order
. /pyublk/settings

# The host's files do not change under us while we run, as far as we care: cache them freely.
# The cost of one message is high under emulation, so messages are large, and attributes that
# nobody here needs are not asked for.
$bb mount -t 9p -o "ro,trans=virtio,version=9p2000.L,msize=524288,cache=loose,noxattr,access=any" \
    host /host
$bb mount -t tmpfs -o mode=755,size=75% ram /ram
$bb mkdir /ram/upper /ram/work
$bb mount -t overlay -o lowerdir=/host,upperdir=/ram/upper,workdir=/ram/work overlay /root

for directory in dev proc sys run; do
    [ -d "/root/$directory" ] || $bb mkdir "/root/$directory"
done
$bb mount -o move /dev /root/dev
$bb mount -o move /proc /root/proc
$bb mount -o move /sys /root/sys
$bb mount -t tmpfs -o mode=755,nosuid,nodev run /root/run
$bb mkdir /root/run/lock /root/run/pyublk-vm
$bb cp /pyublk/* /root/run/pyublk-vm/

exec $bb switch_root /root "$busybox" sh /run/pyublk-vm/session.sh
