# Process 1 of the guest, once it sees the host's files: runs the command, reports how it ended.
#
# The ports to the host, by number: 1 control, 2 standard input, 3 output, 4 errors. Control
# carries lines: from the host `ping`, `signal NAME`, `size ROWS COLUMNS`, `blocked`; from here
# `ready`, `pong`, `exit CODE`.
. /run/pyublk-vm/settings
bb=$busybox
here=/run/pyublk-vm

$bb mkdir -p /dev/pts /dev/shm
$bb mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
$bb mount -t tmpfs -o mode=1777,nosuid,nodev shm /dev/shm
$bb mount -t debugfs debug /sys/kernel/debug
$bb ln -s /proc/self/fd /dev/fd
$bb ln -s fd/0 /dev/stdin
$bb ln -s fd/1 /dev/stdout
$bb ln -s fd/2 /dev/stderr
$bb hostname pyublk-vm
$bb ifconfig lo 127.0.0.1 up

# The host may lack modprobe, and the one of kmod does not read an index without its binary form.
$bb mkdir -p "/lib/modules/$release"
$bb mount -o bind "$modules" "/lib/modules/$release"
$bb ln -s "$busybox" $here/modprobe
$bb ln -sf "$busybox" /sbin/modprobe
echo $here/modprobe >/proc/sys/kernel/modprobe

number=0
while [ $number -lt "$outputs" ]; do
    eval "directory=\$output_$number"
    $bb mkdir -p "$directory"
    # Files here are also written by the host: keep nothing back but what mmap needs.
    $bb mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=mmap,access=any \
        "output$number" "$directory" || exit 1
    number=$((number + 1))
done

for program in insmod lsmod rmmod modinfo; do
    [ -e "/sbin/$program" ] || [ -e "/bin/$program" ] || $bb ln -s "$busybox" "/sbin/$program"
done

# When memory runs out, the command is to be killed, not what reports it.
echo -1000 >/proc/self/oom_score_adj
ulimit -l unlimited
ulimit -Hn 1048576
ulimit -c 0

# The host has already opened its ends, but here a port reads as ended until the news arrive:
# the first line, `go`, tells that they have.
await() {
    until read -r word && [ "$word" = go ]; do
        $bb usleep 2000
    done
}

for port in 1 2 3 4; do
    until set -- /dev/vport*p$port && [ -c "$1" ]; do
        $bb usleep 2000
    done
    eval "port_$port=\$1"
done

exec 3<>"$port_1"
await <&3
{
    while read -r verb first second; do
        case $verb in
        ping) echo pong ;;
        signal) kill -s "$first" -- "-$($bb cat $here/job.group)" ;;
        size) $bb stty -F "$($bb cat $here/job.tty)" rows "$first" cols "$second" ;;
        blocked)
            $bb dmesg -n 8
            echo w >/proc/sysrq-trigger
            echo "pyublk: these tasks are blocked" >/dev/kmsg
            ;;
        esac
    done
    # The host has let go of its end: it is gone, and nobody wants this machine any more.
    $bb poweroff -f
} <&3 >&3 2>/dev/null &

# The command gets pipes rather than the ports, which can be opened only once (`> /dev/stderr`).
$bb mkfifo $here/in $here/out $here/err
$bb cat <$here/out >"$port_3" &
$bb cat <$here/err >"$port_4" &
exec 4>$here/out 5>$here/err
{
    await
    exec $bb cat >$here/in
} <"$port_2" 3>&- 4>&- 5>&- &

# It runs in the foreground of this shell: one in the background would ignore SIGINT.
run() {
    if [ "$terminal" = 1 ]; then
        SHELL=/bin/sh /usr/bin/script -qefc "exec $busybox sh $here/job" /dev/null
    else
        $bb setsid "$busybox" sh $here/job
    fi
}
run <$here/in >$here/out 2>$here/err 4>&- 5>&-
code=$?
# Programs left behind may hold the pipes open: what the command wrote ends with this mark.
printf %s "$end" >&4
printf %s "$end" >&5
number=0
while [ $number -lt "$outputs" ]; do
    eval "directory=\$output_$number"
    $bb umount "$directory" 2>/dev/null || $bb sync -f "$directory"
    number=$((number + 1))
done
echo "exit $code" >&3
# The host ends the machine now.
while :; do
    $bb sleep 3600
done
